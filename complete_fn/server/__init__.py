"""The service's HTTP side. `app.make_app` puts it together; everything else in `complete_fn` knows no HTTP."""
