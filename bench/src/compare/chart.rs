//! SVG charts: bars with bounds, and lines over a linear or logarithmic scale.

use std::fmt::Write as _;

const WIDTH: f64 = 780.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 110.0;
const BAR: f64 = 26.0;
const HEIGHT: f64 = 280.0;
const FOOT: f64 = 40.0;

/// Told apart by most eyes (after Okabe and Ito).
const COLOURS: [&str; 7] = ["#6b7280", "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#e69f00"];

/// Colour of the series with this position.
pub(super) fn colour(position: usize) -> &'static str {
    COLOURS[position % COLOURS.len()]
}

/// A value with its bounds.
pub(super) struct Bar<'a> {
    pub(super) name: &'a str,
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) colour: &'static str,
}

/// Horizontal bars from 0, a thin line for the bounds of each, and a mark at `mark`.
pub(super) fn bars(bars: &[Bar<'_>], mark: f64) -> String {
    let most = bars.iter().map(|bar| bar.high).fold(mark, f64::max);
    let height = BAR * bars.len() as f64 + FOOT;
    let x = |value: f64| LEFT + (WIDTH - LEFT - RIGHT) * value / most;
    let mut svg = open(height);
    for tick in ticks(0.0, most) {
        vertical(&mut svg, x(tick), height - FOOT, &trim(tick), "grid");
    }
    for (position, bar) in bars.iter().enumerate() {
        let top = BAR * position as f64 + 4.0;
        let middle = top + (BAR - 8.0) / 2.0;
        push(
            &mut svg,
            format_args!(
                "<rect x='{LEFT}' y='{top:.1}' width='{:.1}' height='{:.1}' fill='{}'/>\
                 <line x1='{:.1}' x2='{:.1}' y1='{middle:.1}' y2='{middle:.1}' class='bound'/>\
                 <text x='{:.1}' y='{:.1}' text-anchor='end'>{}</text><text x='{:.1}' y='{:.1}'>{:.2}</text>",
                x(bar.value) - LEFT,
                BAR - 8.0,
                bar.colour,
                x(bar.low),
                x(bar.high),
                LEFT - 6.0,
                middle + 4.0,
                escape(bar.name),
                x(bar.high) + 6.0,
                middle + 4.0,
                bar.value
            ),
        );
    }
    push(
        &mut svg,
        format_args!("<line x1='{0:.1}' x2='{0:.1}' y1='0' y2='{1}' class='mark'/></svg>", x(mark), height - FOOT),
    );
    svg
}

/// A line through points.
pub(super) struct Line<'a> {
    pub(super) name: &'a str,
    pub(super) points: Vec<(f64, f64)>,
    pub(super) colour: &'static str,
}

/// How an axis is divided.
pub(super) enum Scale {
    /// From 0, with round numbers.
    Linear,
    /// By powers of ten.
    Logarithmic,
    /// Marks at these places.
    Marks(Vec<(f64, String)>),
}

/// Lines in one coordinate system.
pub(super) fn lines(lines: &[Line<'_>], horizontal: &Scale, upright: &Scale, unit: &str) -> String {
    let points = || lines.iter().flat_map(|line| &line.points);
    let most_x = points().map(|point| point.0).fold(f64::MIN, f64::max);
    let (least_y, most_y) = points().fold((f64::MAX, f64::MIN), |(l, m), point| (l.min(point.1), m.max(point.1)));
    if most_x <= 0.0 || most_y <= 0.0 {
        return String::new();
    }
    let logarithmic = matches!(upright, Scale::Logarithmic);
    let (bottom, top) = if logarithmic {
        (10_f64.powf(least_y.max(0.1).log10().floor()), 10_f64.powf(most_y.log10().ceil()))
    } else {
        (0.0, most_y * 1.05)
    };
    let x = |value: f64| LEFT + (WIDTH - LEFT - RIGHT) * value / most_x;
    let y = |value: f64| {
        let part =
            if logarithmic { (value.max(bottom) / bottom).log10() / (top / bottom).log10() } else { value / top };
        (HEIGHT - FOOT) * (1.0 - part) + 8.0
    };
    let mut svg = open(HEIGHT + 8.0);
    for tick in if logarithmic { powers(bottom, top) } else { ticks(bottom, top) } {
        push(
            &mut svg,
            format_args!(
                "<line x1='{LEFT}' x2='{:.1}' y1='{1:.1}' y2='{1:.1}' class='grid'/>\
                 <text x='{2:.1}' y='{3:.1}' text-anchor='end'>{4}</text>",
                WIDTH - RIGHT,
                y(tick),
                LEFT - 6.0,
                y(tick) + 4.0,
                trim(tick)
            ),
        );
    }
    let marks = match horizontal {
        Scale::Marks(marks) => marks.clone(),
        Scale::Linear | Scale::Logarithmic => ticks(0.0, most_x).into_iter().map(|at| (at, trim(at))).collect(),
    };
    for (at, text) in marks.iter().filter(|(at, _)| *at <= most_x * 1.001) {
        vertical(&mut svg, x(*at), HEIGHT - FOOT + 8.0, text, "grid");
    }
    for (position, line) in lines.iter().enumerate() {
        let mut path = String::new();
        for point in &line.points {
            push(&mut path, format_args!("{:.1},{:.1} ", x(point.0), y(point.1)));
        }
        let legend = 16.0 + 18.0 * position as f64;
        push(
            &mut svg,
            format_args!(
                "<polyline points='{path}' fill='none' stroke='{0}' stroke-width='1.8'/>\
                 <rect x='{1:.1}' y='{2:.1}' width='10' height='10' fill='{0}'/><text x='{3:.1}' y='{legend:.1}'>{4}</text>",
                line.colour,
                WIDTH - RIGHT + 10.0,
                legend - 9.0,
                WIDTH - RIGHT + 25.0,
                escape(line.name)
            ),
        );
    }
    push(&mut svg, format_args!("<text x='4' y='{:.1}'>{}</text></svg>", HEIGHT - FOOT / 2.0 + 12.0, escape(unit)));
    svg
}

/// Text that may stand in HTML.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&#39;").replace('"', "&quot;")
}

fn open(height: f64) -> String {
    format!("<svg viewBox='0 0 {WIDTH} {height:.0}' role='img'>")
}

fn vertical(svg: &mut String, x: f64, bottom: f64, text: &str, class: &str) {
    push(
        svg,
        format_args!(
            "<line x1='{x:.1}' x2='{x:.1}' y1='0' y2='{bottom:.1}' class='{class}'/>\
             <text x='{x:.1}' y='{:.1}' text-anchor='middle'>{text}</text>",
            bottom + 16.0
        ),
    );
}

fn push(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("writing to a string cannot fail");
}

/// About five round numbers that divide a range.
fn ticks(from: f64, to: f64) -> Vec<f64> {
    let rough = (to - from) / 5.0;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    (0..=((to - from) / step) as usize).map(|number| from + step * number as f64).collect()
}

fn powers(from: f64, to: f64) -> Vec<f64> {
    (from.log10().round() as i32..=to.log10().round() as i32).map(|power| 10_f64.powi(power)).collect()
}

fn trim(value: f64) -> String {
    match value {
        v if v >= 1000.0 => format!("{}k", v / 1000.0),
        v => format!("{}", (v * 1000.0).round() / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_round() {
        assert_eq!(ticks(0.0, 1.1), [0.0, 0.5, 1.0]);
        assert_eq!(ticks(0.0, 90_000.0), [0.0, 20_000.0, 40_000.0, 60_000.0, 80_000.0]);
        assert_eq!(powers(10.0, 1000.0), [10.0, 100.0, 1000.0]);
    }

    #[test]
    fn a_bar_is_as_long_as_its_value() {
        let bar = |name, value| Bar { name, value, low: value, high: value, colour: colour(0) };
        let svg = bars(&[bar("a<b", 1.0), bar("half", 0.5)], 1.0);
        assert!(svg.contains("width='520.0'") && svg.contains("width='260.0'") && svg.contains("a&lt;b"), "{svg}");
    }
}
