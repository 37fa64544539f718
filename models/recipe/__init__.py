"""How the bundled pair is made: corpus, tokenizer, pre-training, distillation, evaluation."""
