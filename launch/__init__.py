"""How it is run: commands at the top, the DeepSpeed machinery below them."""
