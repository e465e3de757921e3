"""The service's HTTP side, which `app.make_app` puts together. The other rooms of `complete_fn` know no HTTP server."""
