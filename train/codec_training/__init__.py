"""Training of the Mimi codec: what ``python -m train.codec`` is made of.

``config`` the settings, ``sources`` and ``windows`` the data, ``quantizer`` codebooks that learn,
``losses``, ``discriminator``, ``balancer`` and ``semantic`` what is minimised, ``generator`` one
differentiable pass, ``task`` the steps, ``evaluation`` the figures, ``teacher`` the one file that
knows torch.
"""
