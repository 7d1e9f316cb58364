"""How a plan starts: files that a shell or a cluster's scheduler runs.

Comes in: a plan and the launcher's settings. Goes out: file names with their text, and which of them are executable.
Ranks are placed by static rendezvous: with a dynamic one the order of nodes is not kept, and tensor parallel groups
would leave their node.
"""
