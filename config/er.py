# ER (paper): γ = exp(β) exp(α − mean α), which starts at β = 0, α = 0 [R].
reparam = "er"
