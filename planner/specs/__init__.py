"""What a person declares: model, job, hardware profile, layout, policy; and the files they come from.

Comes in: YAML, JSON, Hugging Face configs, names of shipped examples. Goes out: frozen pydantic objects with no
arithmetic beyond derived sizes. An error in a file names file, line, column, the reason and the fix.
"""
