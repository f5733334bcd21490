"""transformers 5.23 as programs: its modelling code line by line, forward and, trained, back.

Written beside models/<type>/modeling_<type>.py, integrations/ (sdpa_attention.py, moe.py),
masking_utils.py and cache_utils.py of that version, without padding. What keeps a tensor alive are
Python's references there and, as every writer here names what the code there names, here.

Shapes.  B batch · T tokens of this pass · S context after it · P = S − T · h hidden · H query heads
         G kv heads · D head dim · E experts · k experts per token · b bytes of the model dtype
"""
