"""What a layout costs: seconds and bytes. Pure numpy functions, arrays of layouts in, arrays out.

Comes in: a `Task` (model, job, hardware, accounting of an engine) and a `LayoutArray`. Goes out: integer nanoseconds and
bytes, so that equality is exact. One layout is an array of length one; there is no scalar twin.
"""
