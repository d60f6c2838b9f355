//! The options that say how tokens are chosen and when a text ends: the names of llama.cpp and Hugging Face.

use peregrine::Result;
use peregrine::engine::Engine;
use peregrine::prompt::Template;
use peregrine::sampler::Sampling;

use super::args::Args;
use super::report::is_greedy;

/// The options as given, before the model is known.
#[derive(Default)]
pub(super) struct SamplingFlags {
    sampling: Sampling,
    /// `None`: the model decides.
    template: Option<Template>,
    /// Options given that only act when sampling.
    need_temperature: Vec<String>,
}

/// The help of these options.
pub(super) const HELP: &str = "  -n, --max-new-tokens N    tokens to make at most (512); also --n-predict
      --temperature T       0 (default) is greedy: always the likeliest token; else sample; also --temp
      --top-k K             sample from the K likeliest (50); 0 is no limit
      --top-p P             sample from the likeliest that together have this probability (1)
      --min-p P             drop what is less likely than P times the likeliest (0)
      --seed N              of the sampling (0); the same seed gives the same text
      --repetition-penalty R
                            make what was seen already less likely (1); also --repeat-penalty
      --no-repeat-ngram-size N
                            no run of N tokens twice (0 allows it)
      --stop TEXT           end before TEXT, which is not printed; may be given several times
      --ignore-eos          go on after the end of the text, for measuring
      --speculate           draft from the text so far, verify several tokens a step: the same
                            tokens, faster where a text repeats itself
      --template NAME       card (default for instruct models): the model card's dialogue; upstream:
                            the upstream repository's; none (default for others): the text as it is
";

impl SamplingFlags {
    /// Takes `option` if it is one of these.
    pub(super) fn take(&mut self, option: &str, args: &mut Args) -> Result<bool> {
        let s = &mut self.sampling;
        match option {
            "-n" | "--max-new-tokens" | "--n-predict" => {
                s.max_new_tokens = args.parse("a number of tokens")?
            }
            "--temperature" | "--temp" => s.temperature = args.parse("a number from 0 up")?,
            "--top-k" => s.top_k = args.parse("a number of tokens, 0 for no limit")?,
            "--top-p" => s.top_p = args.parse("a number above 0, at most 1")?,
            "--min-p" => s.min_p = args.parse("a number from 0 to 1")?,
            "--seed" => s.seed = args.parse("a whole number from 0 up")?,
            "--repetition-penalty" | "--repeat-penalty" => {
                s.repetition_penalty = args.parse("a number above 0")?
            }
            "--no-repeat-ngram-size" => {
                s.no_repeat_ngram_size = args.parse("a number of tokens, 0 for no limit")?
            }
            "--stop" => s.stop.push(args.text()?),
            "--ignore-eos" => s.ignore_eos = true,
            "--speculate" => s.speculate = true,
            "--template" => self.template = Some(template(args)?),
            _ => return Ok(false),
        }
        if matches!(option, "--top-k" | "--top-p" | "--min-p" | "--seed") {
            self.need_temperature.push(option.to_string());
        }
        Ok(true)
    }

    /// What to tell someone who gave sampling options but does not sample.
    pub(super) fn note(&self) -> Option<String> {
        let without_effect = !self.need_temperature.is_empty() && is_greedy(&self.sampling);
        without_effect.then(|| {
            let options = self.need_temperature.join(", ");
            format!("greedy, so {options} has no effect: add --temperature 0.7 or so to sample")
        })
    }

    /// Checks the values before anything is loaded.
    ///
    /// # Errors
    /// [`peregrine::Error::Usage`], naming the option.
    pub(super) fn check(&self) -> Result<()> {
        self.sampling.validate()
    }

    /// The template asked for, or the model's.
    pub(super) fn template(&self, engine: &Engine) -> Template {
        let default = if engine.checkpoint().is_instruct() { Template::Card } else { Template::None };
        self.template.unwrap_or(default)
    }

    /// The whole of the options, with the texts that end an answer of `template`.
    pub(super) fn with_stops_of(&self, template: Template) -> Sampling {
        let mut sampling = self.sampling.clone();
        sampling.stop.extend(template.stop_strings().iter().map(ToString::to_string));
        sampling
    }
}

fn template(args: &mut Args) -> Result<Template> {
    let text = args.text()?;
    text.parse().map_err(|_| args.bad_value(&text, "card, upstream or none"))
}
