"""Which layout is best, and the proof.

Comes in: a `Task`, an `Engine`, a declared space. Goes out: the proven optimum of that space under the integer cost
model with its certificate and the k best alternatives, or a proof that nothing fits with the reason.

The way: `space` enumerates outer rows and counts what rules exclude; `bounds` drops rows that cannot fit (exactly) and
bounds the rest from below; `solve` raises a target until a plan is found below it, with the exact inner problems of
`stages` (layers and recompute per stage: dynamic programming proposes, CP-SAT must agree) and a CP-SAT master that
chooses; `explain` says why nothing fits.
"""
