"""The families of ops: linear.py, experts.py, dora.py and cayley.py define what autograd saves, pairs.py runs torch on
any device."""
