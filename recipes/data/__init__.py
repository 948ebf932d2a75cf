"""Where rows come from, how they become token sequences, and in which order they are read.

sources → encode → cache → packing → order. Nothing here imports torch: the checks run before torch does.
"""
