"""What executes a plan: which layouts it accepts, and how it accounts memory and communication, as data.

Comes in: an engine's name. Goes out: an `Engine` with its rules and its `Accounting`. One file an engine.
"""
