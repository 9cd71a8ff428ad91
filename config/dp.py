# DP (paper): a scale vector on the output side of q, k, v, gate and up too. Where it acts is our reading.
placement = "dual"
