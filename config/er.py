# ER (paper; the formula is our reconstruction): γ = exp(β) √n α/‖α‖.
reparam = "er"
