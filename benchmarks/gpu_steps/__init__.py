"""The steps of benchmarks/gpu.py: each module measures one thing, each sub-step has a process of its own.

`catalogue` lists them, `processes` runs them, `journal` keeps their rows, `tables` shows these. A module of a step has
functions `name(context, **arguments)` that prepare what needs no device and return what is to be done on it.
"""
