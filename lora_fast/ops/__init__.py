"""The three families of ops: which implementation runs, and what autograd keeps."""
