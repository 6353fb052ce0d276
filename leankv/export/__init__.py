"""A bundle as a Hugging Face repository that loads anywhere, without LeanKV: its code travels with it."""
