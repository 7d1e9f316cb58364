"""Plans and findings for people and for machines: terminal tables, data frames, CI formats.

Comes in: a `Plan`, an estimate, findings. Goes out: text on a stream. Machine formats never pass through rich.
"""
