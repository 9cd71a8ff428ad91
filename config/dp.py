# DP (paper): a scale vector before and after each branch.
placement = "dual"
