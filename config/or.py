# OR (paper): γ = β √n α/‖α‖.
reparam = "or"
