//! Pictures of results in one self-contained file: a roofline with every op on it, tokens a second over depth, the time from one
//! token to the next, and where a pass spends its time. Black on white: readable in a dark browser window and on paper.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use super::machine::Ceilings;
use super::panel::{HEIGHT, Panel, WIDTH, escape};
use super::row::Row;
use crate::error::{Error, Result, one_line};

#[cfg(feature = "cuda")]
use super::breakdown::OpTime;
/// A build without a GPU takes nothing apart.
#[cfg(not(feature = "cuda"))]
pub enum OpTime {}

/// Colours that differ in lightness too, for print and for eyes that see few hues (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9"];

/// Writes the pictures there are figures for. `file` ends in `.svg` or `.html`.
///
/// # Errors
/// [`Error::Io`] if the file cannot be written.
pub fn write(file: &Path, rows: &[Row], ops: &[OpTime], ceilings: Option<Ceilings>) -> Result<()> {
    let svg = draw(rows, ops, ceilings);
    let html = file.extension().is_some_and(|e| e == "html");
    let text = if html {
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>peregrine bench</title>\n\
             <style>body{{margin:1em auto;max-width:{WIDTH}px;background:#fff}} svg{{width:100%;height:auto}}</style></head>\n\
             <body>{svg}</body></html>\n"
        )
    } else {
        svg
    };
    let shown = one_line(&file.display().to_string());
    fs::write(file, text).map_err(|e| Error::Io(format!("cannot write {shown}: {e}")))
}

/// All pictures, one under the other, as an SVG.
#[must_use]
pub fn draw(rows: &[Row], ops: &[OpTime], ceilings: Option<Ceilings>) -> String {
    let mut panels = vec![];
    #[cfg(feature = "cuda")]
    if let Some(ceilings) = ceilings
        && !ops.is_empty()
    {
        panels.push(roofline(ops, ceilings));
        panels.push(flames(ops));
    }
    #[cfg(not(feature = "cuda"))]
    let _ = (ops, ceilings);
    panels.push(over_depth(rows));
    panels.push(histogram(rows));
    let height = HEIGHT * panels.len() as f64 + 60.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"DejaVu Sans, Verdana, sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    let title = rows.first().map_or(String::new(), |row| {
        let device =
            if row.text("gpu_info").is_empty() { row.text("cpu_info") } else { row.text("gpu_info") };
        format!("{} on {device}, {}", row.text("model_type"), row.text("test_time"))
    });
    let _ =
        writeln!(svg, "<text x=\"20\" y=\"30\" font-size=\"16\">peregrine bench: {}</text>", escape(&title));
    for (i, panel) in panels.iter().enumerate() {
        let _ = writeln!(svg, "<g transform=\"translate(0,{})\">\n{panel}</g>", 50.0 + HEIGHT * i as f64);
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(feature = "cuda")]
fn roofline(ops: &[OpTime], ceilings: Ceilings) -> String {
    let ops: Vec<&OpTime> = ops.iter().filter(|op| op.work.flop > 0.0 && op.us > 0.0).collect();
    let (peak, read) = (ceilings.flop_per_second / 1e12, ceilings.bytes_per_second / 1e12);
    let rates = ops.iter().map(|op| op.work.flop / op.us / 1e6);
    let low = rates.fold(peak, f64::min).max(1e-6) / 2.0;
    let mut panel = Panel::new(
        "Roofline: what each op does of what the machine can",
        (0.05, 5000.0, true, "FLOP a byte"),
        (low, peak * 2.0, true, "TFLOP/s"),
    );
    let knee = peak / read;
    panel.line(&[(0.05, 0.05 * read), (knee, peak), (5000.0, peak)], "#000", false);
    panel.legend("#000", &format!("{read:.2} TB/s, {peak:.0} TFLOP/s, measured"));
    let (mut passes, mut labels): (Vec<&str>, Vec<_>) = (Vec::new(), Vec::new());
    for (i, op) in ops.iter().enumerate() {
        if !passes.contains(&op.pass.as_str()) {
            passes.push(&op.pass);
            panel.legend(COLOURS[(passes.len() - 1) % COLOURS.len()], &op.pass);
        }
        let colour = COLOURS[(passes.len() - 1) % COLOURS.len()];
        let place = (op.work.flop / op.work.bytes, op.work.flop / op.us / 1e6);
        panel.dot(place, colour);
        labels.push((place, colour, (i + 1).to_string()));
        panel.legend("", &format!("{} {}: {:.0} %", i + 1, op.op, op.floor_us / op.us * 100.0));
    }
    for (place, colour, label) in labels {
        panel.label(place, colour, &label);
    }
    panel.svg
}

/// A bar a pass, whose parts are as wide as they take long; the dark part of each is its floor.
#[cfg(feature = "cuda")]
fn flames(ops: &[OpTime]) -> String {
    let mut svg = String::from(
        "<text x=\"20\" y=\"30\" font-size=\"14\" font-weight=\"bold\">Where the time goes: width is time, the dark part is the floor</text>\n",
    );
    for (row, pass) in
        super::breakdown::passes(ops).filter(|pass| pass.iter().any(|op| op.floor_us > 0.0)).enumerate()
    {
        let total: f64 = pass.iter().map(|op| op.us).sum();
        let y = 60.0 + 115.0 * row as f64;
        let name = pass.first().map_or("", |op| op.pass.as_str());
        let _ = writeln!(svg, "<text x=\"20\" y=\"{y}\">{}: {total:.0} us</text>", escape(name));
        let mut x = 20.0f64;
        // Names stand below their parts, in the first of three lines that is free there.
        let mut ends = [0.0f64; 3];
        for (i, op) in pass.iter().enumerate() {
            let width = op.us / total * (WIDTH - 40.0);
            let floor = (op.floor_us / op.us).min(1.0) * width;
            let colour = COLOURS[i % COLOURS.len()];
            let name_width = op.op.len() as f64 * 6.4 + 8.0;
            let name_x = (x + 3.0).min(WIDTH - 20.0 - name_width).max(20.0);
            let free = ends.iter().position(|&end| end <= name_x);
            let (label, line) = match free {
                Some(line) if width > 2.0 => (op.op.as_str(), line),
                _ => ("", 0),
            };
            if !label.is_empty() {
                ends[line] = name_x + name_width;
            }
            let _ = writeln!(
                svg,
                "<g><title>{} {:.1} us, floor {:.1}</title><rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"40\" \
                 fill=\"{colour}\" fill-opacity=\"0.25\" stroke=\"#fff\"/><rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{floor:.1}\" \
                 height=\"40\" fill=\"{colour}\" fill-opacity=\"0.7\"/><text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\">{}</text></g>",
                escape(&op.op),
                op.us,
                op.floor_us,
                y + 8.0,
                y + 8.0,
                name_x,
                y + 62.0 + 14.0 * line as f64,
                escape(label)
            );
            x += width;
        }
    }
    svg
}

/// `1 text`, `8 texts`.
fn texts(row: &Row) -> String {
    let texts = row.number("n_seqs");
    format!("{texts:.0} text{}", if texts == 1.0 { "" } else { "s" })
}

/// Tokens a second over the tokens in front, a line for each kind of test and number of texts.
fn over_depth(rows: &[Row]) -> String {
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    for row in rows {
        let texts = texts(row);
        let kind = if row.number("n_gen") > 0.0 {
            format!("answer of {:.0}, {texts}", row.number("n_gen"))
        } else {
            format!("prompt of {:.0}, {texts}", row.number("n_prompt"))
        };
        let point = (row.number("n_depth"), row.number("avg_ts"));
        match lines.iter_mut().find(|line| line.0 == kind) {
            Some(line) => line.1.push(point),
            None => lines.push((kind, vec![point])),
        }
    }
    let all = || lines.iter().flat_map(|line| line.1.iter().copied());
    let deepest = all().map(|p| p.0).fold(128.0, f64::max);
    let (low, high) = all().fold((f64::MAX, 1.0), |(l, h): (f64, f64), p| (l.min(p.1), h.max(p.1)));
    let mut panel = Panel::new(
        "Tokens a second over what is in the cache before",
        (0.0, deepest, false, "tokens before"),
        (low / 2.0, high * 2.0, true, "tokens/s, all texts"),
    );
    for (i, (kind, points)) in lines.iter_mut().enumerate() {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let colour = COLOURS[i % COLOURS.len()];
        panel.line(points, colour, i >= COLOURS.len());
        for &point in points.iter() {
            panel.dot(point, colour);
        }
        let values: Vec<String> = points.iter().map(|point| format!("{:.0}", point.1)).collect();
        panel.legend(colour, kind);
        panel.legend("", &values.join(", "));
    }
    panel.svg
}

/// The times from one token to the next.
fn histogram(rows: &[Row]) -> String {
    let mut series = Vec::new();
    for row in rows {
        let Some(found) = row.0.get("itl_histogram").filter(|h| h.is_object()) else { continue };
        let edge = |name: &str| found[name].as_f64().unwrap_or(0.0) / 1e6;
        let counts: Vec<f64> =
            found["counts"].as_array().map_or(Vec::new(), |c| c.iter().filter_map(|v| v.as_f64()).collect());
        let name = format!("{}, {:.0} before", texts(row), row.number("n_depth"));
        series.push((name, edge("from_ns"), edge("to_ns"), counts));
    }
    let low = series.iter().map(|s| s.1).fold(f64::MAX, f64::min).min(1e6);
    let high = series.iter().map(|s| s.2).fold(low + 1e-3, f64::max);
    let span = high - low;
    let mut panel = Panel::new(
        "From one token's arrival to the next's",
        ((low - span * 0.05).max(0.0), high + span * 0.05, false, "ms"),
        (0.0, 1.0, false, "part of the most frequent"),
    );
    for (i, (name, from, to, counts)) in series.iter().enumerate() {
        let most = counts.iter().copied().fold(1.0, f64::max);
        let width = (to - from) / counts.len().max(1) as f64;
        let mut points = vec![(*from, 0.0)];
        for (bin, count) in counts.iter().enumerate() {
            let left = from + width * bin as f64;
            points.extend([(left, count / most), (left + width, count / most)]);
        }
        points.push((*to, 0.0));
        let colour = COLOURS[i % COLOURS.len()];
        panel.line(&points, colour, i >= COLOURS.len());
        panel.legend(colour, name);
    }
    panel.svg
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every tag that opens closes, in order; attributes are quoted. Enough of XML for what is drawn here.
    fn assert_well_formed(xml: &str) {
        let mut open = Vec::new();
        for part in xml.split('<').skip(1) {
            let (tag, text) = part.split_once('>').expect("a tag ends");
            assert!(!text.contains('&') || text.contains(';'), "{text}");
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            let name: String =
                tag.trim_start_matches('/').chars().take_while(char::is_ascii_alphanumeric).collect();
            match tag {
                tag if tag.starts_with('/') => assert_eq!(open.pop(), Some(name), "{tag}"),
                tag if tag.ends_with('/') => {}
                _ => open.push(name),
            }
        }
        assert!(open.is_empty(), "{open:?}");
        assert!(!xml.contains("NaN") && !xml.contains("inf"), "a place that is none");
    }

    #[test]
    fn a_plot_is_well_formed_whatever_there_is() {
        let mut row = Row::default();
        row.set("model_type", "falcon <7B> & \"more\"");
        for (name, value) in [("n_prompt", 0), ("n_gen", 16), ("n_depth", 0), ("n_seqs", 1), ("avg_ts", 812)]
        {
            row.set(name, value);
        }
        row.set(
            "itl_histogram",
            serde_json::json!({ "from_ns": 1.1e6, "to_ns": 1.3e6, "counts": [1, 5, 2] }),
        );
        let mut deep = row.clone();
        deep.set("n_depth", 1024);
        for rows in [&[][..], &[row.clone()], &[row, deep]] {
            assert_well_formed(&draw(rows, &[], None));
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn ops_are_on_the_roofline() {
        use crate::measure::work::Work;
        let op = |pass: &str, op: &str, us| OpTime {
            pass: pass.into(),
            op: op.into(),
            launches: 32,
            us,
            work: Work { bytes: 1.8e9, flop: 6.6e9 },
            floor_us: 400.0,
        };
        let ops = [op("step", "gptq_gemv [qkv ; up]", 510.0), op("prompt", "gptq_gemm", 15000.0)];
        let svg = draw(&[], &ops, Some(crate::measure::machine::H200));
        assert_well_formed(&svg);
        assert_eq!(svg.matches("<circle").count(), 2);
    }
}
