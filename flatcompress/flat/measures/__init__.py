"""How flat a minimum is: sharpness, curvature, landscapes, worst-case attacks. Measures only; nothing trains here."""
