"""Hugging Face models as data: their shape, their weights, their loss. Never imports deepspeed."""
