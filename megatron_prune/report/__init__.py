"""A run, or several side by side, as one HTML page for people.

    story       a run's folder -> `Story`: small facts and arrays
    html_page   stories -> the page: page.html, page.css and page.js, with plotly.js and the data, packed, in it

The page asks for nothing from outside, which its own content policy says, too. What it shows is drawn in the browser.
"""
