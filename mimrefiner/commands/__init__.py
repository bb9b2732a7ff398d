"""Commands of the command line, a file for each kind.

``add_NAME`` declares a command and ``do_NAME`` runs it; ``mimrefiner.__main__`` lists them.
"""
