"""The command line of vlbridge.

It is a package beside `vlbridge`, not in it: `import vlbridge` imports torch and transformers, which takes seconds, and
`vlbridge --help`, `--version` and a misspelled option need neither. The modules here import `vlbridge` only in
functions.
"""
