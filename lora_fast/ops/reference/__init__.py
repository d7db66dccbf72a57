"""The plain-torch twin of every op with a kernel. It specifies the op and runs where there is no GPU."""
