"""The cpu device's kernels in C++: attention over the paged cache, linears over packed weights, norms and rotation.

`build` compiles them for the machine at hand, at first use; `library` is what Python calls. They do what `torch_kernels`
does, which is their oracle and stands in for them where no compiler is.
"""
