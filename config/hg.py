# HG (paper): q, k, v, gate, up and the LM head each have their own γ. Figure 5.
heterogeneous = True
