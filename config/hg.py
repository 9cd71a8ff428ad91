# HG (paper): q, k, v, gate and up have a γ of their own.
heterogeneous = True
