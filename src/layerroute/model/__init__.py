"""The routed model: backbones, routers, the forward and generation under a route, the adapter folder."""
