"""Running a bundle: pictures and words in, boxes out. No torch, no transformers."""
