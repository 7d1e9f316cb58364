"""planner: which parallel configuration should this training job use on this cluster, and does it fit?"""
