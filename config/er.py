# ER (paper): γ = exp(β) exp(α − mean α).
reparam = "er"
