# DNP (paper): DP with a norm between the branch and its output vector.
placement = "dual_norm"
