"""Microbenchmarks of the machine in hand: a hardware profile whose figures were measured here.

In: the devices of this host, and a shipped profile for what one host cannot tell. Out: raw timings (`records`), constants that
invert the cost model's own formulas (`fit`, `network`), a profile (`profile`). Nobody but the command line imports this room.
"""
