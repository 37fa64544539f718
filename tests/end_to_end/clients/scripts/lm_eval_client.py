"""A user of lm-evaluation-harness: `python lm_eval_client.py BASE_URL CHECKPOINT FOLDER` prints one JSON object.

Log-likelihoods of one local task: of the harness' own `hf` model, and of ours with texts and with tokens.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval
from lm_eval.tasks import TaskManager

# What models end with, full sentences and code, is where servers and the harness count tokens differently.
DOCUMENTS = [
    ("def add(a, b):\n    return", [" a + b", " a - b\n", " None"]),
    ("class Stack:\n    def __init__(self):\n        self", [".items = []", ".items", " = 3\n\n\n"]),
    ("import", [" os", " os\nimport sys\n", " nothing."]),
    ("The function returns", [" the result.", " a list of all values.", " None, which is not a value."]),
    ("Raises ValueError if", [" the argument is negative.", " it is not a number.\n", " ... or not."]),
    ("# This is a comment.", ["\n\nx = 1\n", " It ends here.", "\n\n\nclass A:\n    pass\n"]),
    ("for i in range(10):\n    print(i)", ["\n\nprint(i)\n", "\n        pass", "  # prints all numbers."]),
    ("try:\n    pass\nexcept", [" Exception:\n    raise", " ValueError as error:\n    return None\n", " as e: pass"]),
    ("Caf\u00e9 na\u00efve \u2603", [" \u00e9t\u00e9.", " \U0001f600 \u2603", " et alors!"]),
    ("if __name__ == '__main__':", ["\n    main()", "\n    main()\n", " main()"]),
    ("return self", [".value + 1", "._value.\n"]),
    (
        '"""Return the sum of two numbers.',
        [' That is all."""', '\n\n    Both must be integers.\n    """', " Nothing else."],
    ),
]
TASK = """
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def written_task(folder: Path) -> TaskManager:
    folder.mkdir(exist_ok=True)
    data = folder / "data.jsonl"
    lines = [json.dumps({"text": text, "choices": choices}) for text, choices in DOCUMENTS]
    data.write_text("\n".join(lines))
    (folder / "endings.yaml").write_text(TASK.format(data=data))
    return TaskManager(include_path=str(folder), include_defaults=False)


def log_likelihoods(tasks: TaskManager, kind: str, **arguments: Any) -> list[float]:
    results = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=["endings"], task_manager=tasks, batch_size=1, log_samples=True
    )
    samples = sorted(results["samples"]["endings"], key=lambda sample: sample["doc_id"])
    return [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]


def main(base_url: str, checkpoint: str, folder: str) -> None:
    tasks = written_task(Path(folder))
    served = {
        "model": "base",
        "base_url": f"{base_url}/completions",
        "tokenizer": checkpoint,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 2,
        "max_retries": 1,
    }
    told = {
        "hf": log_likelihoods(tasks, "hf", pretrained=checkpoint, dtype="float32", device="cpu"),
        "tokens": log_likelihoods(tasks, "local-completions", tokenized_requests=True, **served),
        "texts": log_likelihoods(tasks, "local-completions", tokenized_requests=False, **served),
    }
    print(json.dumps(told))


main(*sys.argv[1:])
