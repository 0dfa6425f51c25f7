"""The web page in a real browser, against the real server, whose model says what each test tells it to.

Every test ends with what holds for all of them: no request went anywhere but to the server, nothing broke the
Content-Security-Policy, no script failed and no dialog came up.
"""
