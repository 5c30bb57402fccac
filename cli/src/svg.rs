//! Pictures in SVG, for `minivmm trace-view --svg`, `--explain=svg` and `minivmm powercut --picture`. Lengths are in pixels.

use std::fmt::Write;

/// A picture that is being drawn. Texts may have any characters: they are escaped.
pub(crate) struct Svg(String);

impl Svg {
    /// An empty picture, white.
    pub(crate) fn new(width: f64, height: f64) -> Self {
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
        ))
    }

    /// A box: its left upper corner, its size, its color, and the text that a viewer shows at the pointer.
    pub(crate) fn rect(
        &mut self,
        (x, y): (f64, f64),
        (width, height): (f64, f64),
        fill: &str,
        title: &str,
    ) {
        let title = escaped(title);
        self.draw(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\"><title>{title}</title></rect>"
        ));
    }

    /// A text that begins, ends or has its middle at `x` (`anchor`), on the base line `y`.
    pub(crate) fn text(&mut self, (x, y): (f64, f64), anchor: &str, fill: &str, text: &str) {
        let text = escaped(text);
        self.draw(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{fill}\">{text}</text>"
        ));
    }

    /// A line, of dashes if `dashes` says how long they and their gaps are.
    pub(crate) fn line(
        &mut self,
        (x1, y1): (f64, f64),
        (x2, y2): (f64, f64),
        stroke: &str,
        dashes: &str,
    ) {
        self.draw(format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{stroke}\" stroke-dasharray=\"{dashes}\"/>"
        ));
    }

    fn draw(&mut self, element: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.0, "{element}");
    }

    pub(crate) fn finish(self) -> String {
        self.0 + "</svg>\n"
    }
}

/// As text of XML 1.0, which has no control characters (§2.2).
fn escaped(text: &str) -> String {
    let is_none = |at: char| at.is_control() || matches!(at, '\u{fffe}' | '\u{ffff}');
    text.replace(is_none, "\u{fffd}")
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
