"""The command line: one thin module a command. Parses, calls one function, prints.

Standard output carries the result only; progress, warnings and errors go to standard error. Exit codes: 0 ok, 1 findings,
2 usage or input, 3 proven infeasible, 4 time limit without a plan, 5 optional part missing, 70 internal error, 130/143 signals.
"""
