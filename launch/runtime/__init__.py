"""The machinery under the commands. The only room that imports deepspeed."""
