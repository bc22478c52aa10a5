"""How the demo model was made: text, layer-wise routers, distillation. Not needed to use it."""
