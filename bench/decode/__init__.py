"""One stream at a time: plain decoding beside drafting."""
