"""The three families of ops: linear.py and cayley.py define what autograd saves, pairs.py runs torch on any device."""
