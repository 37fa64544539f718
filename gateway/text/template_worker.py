"""A process that renders chat templates within limits: they are programs of their checkpoints' makers. `python -m
gateway.text.template_worker` reads conversations from its standard input and answers on its standard output, a line of
JSON each: the text, or the error."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path

# Beyond the process itself. A conversation has 4 Mi characters at most.
MEMORY_BYTES = 512 << 20
CPU_S = 5
_MOST_CHARS = 32 << 20


def main() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template  # not for importers of the limits

    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere than on Linux memory is bounded by the time that it takes to fill
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))
    for line in sys.stdin.buffer:
        # What the sum of all renderings may take by the end of this one; the process does not survive more.
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + CPU_S, resource.RLIM_INFINITY))
        try:
            arguments = json.loads(line)
            # As the library's tokenizers do: templates handle a missing entry, not one that is None.
            messages = [
                {name: value for name, value in message.items() if value is not None}
                for message in arguments.pop("messages")
            ]
            (text,), _ = render_jinja_template(conversations=[messages], **arguments)
            answer = {"text": text} if len(text) <= _MOST_CHARS else {"error": f"it makes {len(text)} characters of it"}
        except MemoryError:
            os._exit(1)
        except Exception as error:  # templates refuse in their own words
            answer = {"error": str(error)}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
