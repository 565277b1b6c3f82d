"""Old names, in one place: published checkpoints of VISA, XMem and Llama tokenizers -> ours.

Each function takes what the original system saved and returns what this package loads; nothing is dropped or made up
in silence. The names are those of the released checkpoints (VISA, XMem f3b841d, segment-anything).
"""
