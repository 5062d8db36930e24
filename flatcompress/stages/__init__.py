"""The stages. Each takes a `Workpiece` and its own config and gives the workpiece back, changed.

This is the only place where flat, quant and prune meet: GAQAT's conflict and AdaSAP's radius are plugged into the
flat engine here. No stage knows which stage came before it; what it must know is in the workpiece's plan.
Nothing is imported here, so that reading a recipe (`stages.configs`) does not load what only a run needs.
"""
