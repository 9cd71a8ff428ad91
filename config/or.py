# OR (paper; the formula is our reconstruction): γ = β √n α/‖α‖.
reparam = "or"
