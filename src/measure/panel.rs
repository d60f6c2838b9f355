//! A panel of a picture: two axes with their ticks, lines, dots and a legend, as SVG.

use std::fmt::Write;

pub(super) const WIDTH: f64 = 900.0;
pub(super) const HEIGHT: f64 = 420.0;
/// Of the axes: left, top, right, bottom.
pub(super) const MARGIN: [f64; 4] = [80.0, 50.0, 250.0, 60.0];

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// An axis: from the values it shows to places in the picture.
pub(super) struct Axis {
    low: f64,
    high: f64,
    log: bool,
    from: f64,
    to: f64,
}

impl Axis {
    pub(super) fn at(&self, value: f64) -> f64 {
        let scale = |v: f64| if self.log { v.max(1e-30).log10() } else { v };
        let part = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low));
        self.from + (self.to - self.from) * part.clamp(-0.02, 1.02)
    }

    /// Values to mark: powers of ten, with 2 and 5 of each where there are few, or round steps.
    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let (low, high) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
            let steps: &[f64] = if self.high / self.low < 1e3 { &[1.0, 2.0, 5.0] } else { &[1.0] };
            let all = (low..=high).flat_map(|e| steps.iter().map(move |s| s * 10f64.powi(e)));
            return all.filter(|v| (self.low..=self.high).contains(v)).collect();
        }
        let rough = (self.high - self.low) / 6.0;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|s| s * power).into_iter().find(|&s| s >= rough).unwrap_or(power);
        let first = (self.low / step).ceil() as i64;
        (first..).map(|i| i as f64 * step).take_while(|&v| v <= self.high * 1.000_001).collect()
    }
}

/// A panel with two axes.
pub(super) struct Panel {
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) svg: String,
    legend: usize,
    /// Middles of labels and dots, which further labels keep clear of.
    taken: Vec<(f64, f64)>,
}

/// Room of a dot's label of two characters. Labels are of ops, which only a GPU takes apart.
#[cfg(feature = "cuda")]
const LABEL: (f64, f64) = (14.0, 11.0);
/// Where a label may be beside its dot, best first.
#[cfg(feature = "cuda")]
const PLACES: [(f64, f64); 8] = [
    (13.0, -8.0),
    (13.0, 8.0),
    (-13.0, -8.0),
    (-13.0, 8.0),
    (0.0, -15.0),
    (0.0, 15.0),
    (22.0, 0.0),
    (-22.0, 0.0),
];

impl Panel {
    pub(super) fn new(title: &str, x: (f64, f64, bool, &str), y: (f64, f64, bool, &str)) -> Panel {
        let [left, top, right, bottom] = MARGIN;
        let x_axis = Axis { low: x.0, high: x.1, log: x.2, from: left, to: WIDTH - right };
        let y_axis = Axis { low: y.0, high: y.1, log: y.2, from: HEIGHT - bottom, to: top };
        let mut svg = format!(
            "<text x=\"20\" y=\"30\" font-size=\"14\" font-weight=\"bold\">{}</text>\n",
            escape(title)
        );
        for tick in x_axis.ticks() {
            let at = x_axis.at(tick);
            let _ = writeln!(
                svg,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                y_axis.from,
                y_axis.from + 18.0,
                number(tick)
            );
        }
        for tick in y_axis.ticks() {
            let at = y_axis.at(tick);
            let _ = writeln!(
                svg,
                "<line x1=\"{left}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                x_axis.to,
                left - 6.0,
                at + 4.0,
                number(tick)
            );
        }
        let (middle_x, middle_y) = ((x_axis.from + x_axis.to) / 2.0, (y_axis.from + y_axis.to) / 2.0);
        let _ = writeln!(
            svg,
            "<text x=\"{middle_x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text x=\"20\" y=\"{middle_y:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 20 {middle_y:.1})\">{}</text>",
            HEIGHT - 20.0,
            escape(x.3),
            escape(y.3)
        );
        Panel { x: x_axis, y: y_axis, svg, legend: 0, taken: Vec::new() }
    }

    pub(super) fn line(&mut self, points: &[(f64, f64)], colour: &str, dashed: bool) {
        let points: Vec<String> =
            points.iter().map(|&(x, y)| format!("{:.1},{:.1}", self.x.at(x), self.y.at(y))).collect();
        let dash = if dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        let _ = writeln!(
            self.svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>",
            points.join(" ")
        );
    }

    pub(super) fn dot(&mut self, (x, y): (f64, f64), colour: &str) {
        let (x, y) = (self.x.at(x), self.y.at(y));
        self.taken.push((x, y));
        let _ = writeln!(
            self.svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\" fill=\"{colour}\" stroke=\"#fff\"/>"
        );
    }

    /// A short label beside a dot, where it covers no dot and no other label if there is such a place. After all dots.
    #[cfg(feature = "cuda")]
    pub(super) fn label(&mut self, (x, y): (f64, f64), colour: &str, label: &str) {
        let (x, y) = (self.x.at(x), self.y.at(y));
        let near = |place: &(f64, f64)| {
            let (x, y) = (x + place.0, y + place.1);
            let covered = |t: &&(f64, f64)| (t.0 - x).abs() < LABEL.0 && (t.1 - y).abs() < LABEL.1;
            self.taken.iter().filter(covered).count()
        };
        let place = PLACES.into_iter().min_by_key(near).unwrap_or_default();
        let (x, y) = (x + place.0, y + place.1);
        self.taken.push((x, y));
        let _ = writeln!(
            self.svg,
            "<text x=\"{x:.1}\" y=\"{:.1}\" font-size=\"10\" text-anchor=\"middle\" fill=\"{colour}\">{}</text>",
            y + 3.5,
            escape(label)
        );
    }

    /// A line of the legend, on the right; without a colour it belongs to the line above.
    pub(super) fn legend(&mut self, colour: &str, text: &str) {
        let y = MARGIN[1] + 14.0 * self.legend as f64;
        self.legend += 1;
        let x = WIDTH - MARGIN[2] + 14.0;
        let mark = if colour.is_empty() {
            String::new()
        } else {
            format!("<rect x=\"{x}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/>", y - 9.0)
        };
        let _ = writeln!(
            self.svg,
            "{mark}<text x=\"{:.1}\" y=\"{y:.1}\" font-size=\"11\">{}</text>",
            x + 15.0,
            escape(text)
        );
    }
}

pub(super) fn number(value: f64) -> String {
    match value {
        v if v != 0.0 && v.abs() < 0.01 => format!("{v:.0e}"),
        v if v.abs() < 10.0 && v.fract() != 0.0 => format!("{v:.3}").trim_end_matches('0').to_owned(),
        v => format!("{v:.0}"),
    }
}
