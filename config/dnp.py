# DNP (paper): a norm and a scale vector after q, k, v, gate and up. Where it acts is our reading.
placement = "dual_norm"
