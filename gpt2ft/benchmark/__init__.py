"""Speed and memory: the loop, the reference pass and the decoder, beside the usual way of doing the same.

made_up     conversation trees of random tokens
work        what a step computes: trees, made up or of data, as streams or one path after the other
training    steps of the real loop
usual       the same steps by transformers or TRL, in a process of its own
decoding    replies of both
machine     what this machine can do at most
figures     all of it as numbers
"""
