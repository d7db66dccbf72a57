"""The three families of ops: each module calls the chosen implementation and defines what autograd saves."""
